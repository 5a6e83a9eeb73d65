"""What these tests share with those of the parts that they hurt."""

from tests.e2e.conftest import no_job_outlives_its_module
from tests.roles.verifier.conftest import check, start_pool, workers

__all__ = ["check", "no_job_outlives_its_module", "start_pool", "workers"]
