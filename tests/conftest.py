import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported; child processes inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
