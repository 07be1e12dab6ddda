"""How examples are made, on any machine."""

from hypothesis import HealthCheck, settings

# That one is busy tells nothing of a test.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
