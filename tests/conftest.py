import os
from pathlib import Path

from hypothesis import HealthCheck, settings

# A busy machine makes an example slow, and no promise wrong.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")
# Two workers on two cores: a second thread each would only wait for the other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Who is logged in on this machine is no part of a test.
os.environ["COFUSE_PROFILE"] = os.devnull

# Before anything imports Triton (transformers does): without a GPU its interpreter runs our
# kernels, with one the same tests run the kernels themselves.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"
