from .arguments import DataArguments as DataArguments
from .arguments import Splits as Splits
from .reader import load_splits as load_splits
from .reader import load_test_split as load_test_split
from .source import AnyData as AnyData
