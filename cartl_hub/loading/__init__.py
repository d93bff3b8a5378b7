from .arguments import DataArguments as DataArguments
from .arguments import Splits as Splits
from .opening import AnyData as AnyData
from .reader import load_splits as load_splits
from .reader import load_test_split as load_test_split
