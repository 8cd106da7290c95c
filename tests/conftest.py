"""One thread for each test process: the tests run side by side, and their networks are tiny."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the commands that tests start

import torch  # noqa: E402

torch.set_num_threads(1)
