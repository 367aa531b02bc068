"""Run folders: their contract (`run_files`), and the HTML report made from them.

Training writes run folders; the report and the studio read them. The charts and tables are shared with the studio.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
