from .arguments import FeatureCache as FeatureCache
from .arguments import Schedule as Schedule
from .arguments import TrainingArguments as TrainingArguments
from .checkpoint import TrainingError as TrainingError
from .checkpoint import read_best as read_best
from .loop import train as train
from .result import Result as Result
from .result import Validation as Validation
