"""What the tests of object stores start from: a server, a proxy before it, and buckets."""

from .s3_server import bucket, run_apart, s3, s3_server

__all__ = ["bucket", "run_apart", "s3", "s3_server"]
