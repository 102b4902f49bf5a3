"""The peers as they are shipped, each behind ``loadtest.gpu.work.System``."""
