"""Eight virtual CPU devices for every test; the flag must be set before jax is first imported."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
