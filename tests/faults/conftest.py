"""Jobs of these tests end with them."""

from tests.e2e.conftest import no_job_outlives_its_test

__all__ = ["no_job_outlives_its_test"]
