from .cascade import Budget as Budget
from .checks import run_checks as run_checks
from .run import CURVE_EPS as CURVE_EPS
from .run import EvaluationOptions as EvaluationOptions
from .run import default_attacks as default_attacks
from .run import default_curve as default_curve
from .run import evaluate as evaluate
