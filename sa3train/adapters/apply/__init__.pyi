from .effective_weight import compute_effective_weight as compute_effective_weight
from .load_report import LoadReport as LoadReport
from .load_report import check_fit as check_fit
from .stack import AdapterStack as AdapterStack
