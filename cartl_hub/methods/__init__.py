from .adversarial import AdversarialTraining as AdversarialTraining
from .adversarial import EpsSchedule as EpsSchedule
from .fdm import FDM as FDM
from .finetuning import FineTuning as FineTuning
from .lwf import LwF as LwF
from .method import Batch as Batch
from .method import Method as Method
from .neft import NEFT as NEFT
