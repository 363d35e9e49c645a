"""Whetstone: sharpen a local chatbot on its own conversations."""

import logging
import os

# OpenMP's idle threads spin, and beside other busy programs they spin away the cores that the work needs: three to
# six matrix products a second became twenty with this, on two cores under load. Set before any library
# starts its threads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# peft imports bitsandbytes, which warns that a kernel is missing for inference in four bits: nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
