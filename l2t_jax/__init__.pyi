from . import data as data
from . import errors as errors
from . import models as models
from .method.bilevel import MODES as MODES
from .method.bilevel import apply_gradients as apply_gradients
from .method.bilevel import hypergradient as hypergradient
from .method.bilevel import make_inner_step as make_inner_step
from .method.bilevel import only_while as only_while
from .method.bilevel import unroll as unroll
from .method.hypergradient_check import (
  check_hypergradient as check_hypergradient,
)
from .method.implicit import at_stationary_point as at_stationary_point
from .method.objectives import METHODS as METHODS
from .method.objectives import make_losses as make_losses
from .method.pair_sets import Pair as Pair
from .method.pair_sets import make_pairs as make_pairs
from .method.training import Problem as Problem
from .method.training import Recipe as Recipe
from .method.training import evaluated as evaluated
from .method.training import make_eval_step as make_eval_step
from .method.training import make_train_step as make_train_step
from .method.transfer import TransferWeights as TransferWeights
from .method.transfer import channel_distances as channel_distances
from .method.transfer import init_meta_params as init_meta_params
from .method.transfer import init_regressors as init_regressors
from .method.transfer import matching_loss as matching_loss
from .method.transfer import prepare_source as prepare_source
from .method.transfer import transfer_weights as transfer_weights
from .run.compare import Comparison as Comparison
from .run.compare import compare as compare
from .run.experiments import Experiment as Experiment
from .run.experiments import Settings as Settings
from .run.experiments import Source as Source
from .run.fit import Result as Result
from .run.fit import default_config as default_config
from .run.fit import fit as fit
from .run.predictor import load as load
from .run.sources import load_source as load_source
from .run.train import train as train
from .types import Batch as Batch
from .types import InnerLossFn as InnerLossFn
from .types import InnerState as InnerState
from .types import Mixing as Mixing
from .types import Task as Task
from .types import TrainState as TrainState

__version__: str
