"""Models and data to try subbyte on, what the command line reads, and how to score a network."""

from subbyte.tasks.cifar_resnet import CifarResNet
from subbyte.tasks.digits import DigitsNet, digits_split, train_digits_net
from subbyte.tasks.mobilenet_v1 import MobileNetV1
from subbyte.tasks.preprocessing import ChannelOrder, Preprocessing
from subbyte.tasks.samples import load_labels, load_samples
from subbyte.tasks.scoring import agreement, kl_divergence, top1
from subbyte.tasks.squeezenet import SqueezeNet11
from subbyte.tasks.task import TASKS, Task, default_data_root, digits, mobilenet_v1, resnet20, resnet56, squeezenet

__all__ = [
    "TASKS",
    "ChannelOrder",
    "CifarResNet",
    "DigitsNet",
    "MobileNetV1",
    "Preprocessing",
    "SqueezeNet11",
    "Task",
    "agreement",
    "default_data_root",
    "digits",
    "digits_split",
    "kl_divergence",
    "load_labels",
    "load_samples",
    "mobilenet_v1",
    "resnet20",
    "resnet56",
    "squeezenet",
    "top1",
    "train_digits_net",
]
