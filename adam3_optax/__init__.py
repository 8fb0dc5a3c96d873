"""AdaM3 for JAX: Adam with a third moment, as Optax gradient transformations.

`adam3w(1e-3, third_moment="standardized")` stands where `optax.adamw(1e-3)` stood.
`third_moment=None` is Adam, with moments stored in as little as 2 bytes a parameter.
`bfloat16_parameters` lets any Optax optimizer train bfloat16 parameters without loss.

This AdaM3 averages the cubed deviation of the gradient. It is not the AdaM³ of Wang et
al. (arXiv 2106.11514), which averages m² and has no third moment.
"""

from adam3_optax._adam3 import ScaleByAdam3State as ScaleByAdam3State
from adam3_optax._adam3 import adam3 as adam3
from adam3_optax._adam3 import adam3w as adam3w
from adam3_optax._adam3 import scale_by_adam3 as scale_by_adam3
from adam3_optax._bfloat16 import BFloat16ParametersState as BFloat16ParametersState
from adam3_optax._bfloat16 import bfloat16_parameters as bfloat16_parameters
from adam3_optax._bfloat16 import to_bfloat16_parameters as to_bfloat16_parameters
from adam3_optax._bfloat16 import to_float32_parameters as to_float32_parameters
from adam3_optax._bfloat16_state import BFloat16State as BFloat16State
from adam3_optax._bfloat16_state import bfloat16_state as bfloat16_state
from adam3_optax._convert import convert_state as convert_state
from adam3_optax._convert import from_adam_state as from_adam_state
from adam3_optax._convert import to_adam_state as to_adam_state
from adam3_optax._hyperparameters import BlowUpWarning as BlowUpWarning
from adam3_optax._hyperparameters import Float8Warning as Float8Warning
from adam3_optax._lost_updates_report import LostUpdates as LostUpdates
from adam3_optax._lost_updates_report import LostUpdatesReport as LostUpdatesReport
from adam3_optax._lost_updates_report import lost_updates_report as lost_updates_report
from adam3_optax._rule import ThirdMoment as ThirdMoment
from adam3_optax._sharding import state_shardings as state_shardings
from adam3_optax._third_moment_report import Statistics as Statistics
from adam3_optax._third_moment_report import ThirdMomentReport as ThirdMomentReport
from adam3_optax._third_moment_report import third_moment_report as third_moment_report

__version__ = "0.1.0"

__all__ = [name for name in dir() if not name.startswith("_")]
