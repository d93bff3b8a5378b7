from .importing import Format as Format
from .importing import Imported as Imported
from .importing import import_checkpoint as import_checkpoint
from .reading import CheckpointError as CheckpointError
