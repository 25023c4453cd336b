"""subbyte: post-training quantization below eight bits, from a trained model and a few hundred unlabeled samples."""

from subbyte.allocate.fisher import Fisher
from subbyte.allocate.measured import Measured
from subbyte.allocate.own_loss import OwnLoss
from subbyte.budget import Budget
from subbyte.calibrate.adaquant import AdaQuant
from subbyte.calibrate.adaround import AdaRound
from subbyte.calibrate.blockwise import Blockwise
from subbyte.calibrate.lattice import Lattice
from subbyte.calibrate.loss import CosineDistance, KLDivergence, OutputLoss, RelativeSquaredError
from subbyte.calibrate.networkwise import Networkwise
from subbyte.calibrate.passes import Flavour
from subbyte.calibrate.problem import LayerProblem, LayerSolution, Solver
from subbyte.calibrate.refinement import Refinement
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.calibrate.rows import RowSampling
from subbyte.choices import Choices
from subbyte.errors import DataError, FileError, InfeasibleError, LayerError, ModelError, OptionError, SubbyteError
from subbyte.export.latency import Profile, Timing, profile
from subbyte.export.loading import load
from subbyte.export.onnx import Exported, ExportWarning
from subbyte.export.onnx_model import OnnxModel
from subbyte.export.pack_quantized import CompressedTensors
from subbyte.export.pretrained import load_pretrained
from subbyte.export.targets import OnnxRuntimeCPU, OpenVINOCPU, Simulation, Target, TensorRT
from subbyte.model.equalize import Equalization
from subbyte.pipeline import quantize
from subbyte.quantizers.grid import Grid, WeightGrids
from subbyte.quantizers.ranges import LeastOutputError, MinMax, Percentile, Range
from subbyte.recipes import Recipe, advanced, default, light, relaxed, rounding, thorough, weight_only
from subbyte.result import Result
from subbyte.run.bank import Bank
from subbyte.run.freed_memory import keep_freed_memory
from subbyte.tune.batch_norm import BatchNormTuning
from subbyte.tune.bias import BiasTuning
from subbyte.tune.step_search import StepSearch
from subbyte.widths import Widths

__all__ = [
    "AdaQuant",
    "AdaRound",
    "Bank",
    "BatchNormTuning",
    "BiasTuning",
    "Blockwise",
    "Budget",
    "Choices",
    "CompressedTensors",
    "CosineDistance",
    "DataError",
    "Equalization",
    "ExportWarning",
    "Exported",
    "FileError",
    "Fisher",
    "Flavour",
    "Grid",
    "InfeasibleError",
    "KLDivergence",
    "Lattice",
    "LayerError",
    "LayerProblem",
    "LayerSolution",
    "LeastOutputError",
    "Measured",
    "MinMax",
    "ModelError",
    "Networkwise",
    "OnnxModel",
    "OnnxRuntimeCPU",
    "OpenVINOCPU",
    "OptionError",
    "OutputLoss",
    "OwnLoss",
    "Percentile",
    "Profile",
    "Range",
    "Recipe",
    "Refinement",
    "RelativeSquaredError",
    "Result",
    "RoundToNearest",
    "RowSampling",
    "Simulation",
    "Solver",
    "StepSearch",
    "SubbyteError",
    "Target",
    "TensorRT",
    "Timing",
    "WeightGrids",
    "Widths",
    "advanced",
    "default",
    "keep_freed_memory",
    "light",
    "load",
    "load_pretrained",
    "profile",
    "quantize",
    "relaxed",
    "rounding",
    "thorough",
    "weight_only",
]
