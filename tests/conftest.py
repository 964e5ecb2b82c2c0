"""One thread for what tests compute, here and in the programs that they start.

Their problems are small: a second thread that has to wait for a core, beside other work, costs up to twenty times more.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
