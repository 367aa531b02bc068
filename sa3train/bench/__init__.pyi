from .figures import Figure as Figure
from .figures import Options as Options
from .figures import Record as Record
