"""What the tests of stores start from: a complete one, and for those in object stores a server, a proxy before it, and
buckets.
"""

from .made_stores import complete, made_once
from .s3_server import bucket, run_apart, s3, s3_server

__all__ = ["bucket", "complete", "made_once", "run_apart", "s3", "s3_server"]
