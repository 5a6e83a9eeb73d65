from tests.verify.conftest import check, start_pool, workers

__all__ = ["check", "start_pool", "workers"]
