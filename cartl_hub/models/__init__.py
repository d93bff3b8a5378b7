from .cifar_resnet import CifarResNet as CifarResNet
from .classifier import Classifier as Classifier
from .classifier import create_model as create_model
from .preact_resnet import PreActResNet as PreActResNet
from .wide_resnet import WideResNet as WideResNet
