from .attack import Attack as Attack
from .fgsm import FGSM as FGSM
from .fgsm import NFGSM as NFGSM
from .fgsm import RFGSM as RFGSM
from .pgd import PGD as PGD
