"""Data: COCO JSON -> checked Parquet shards -> a reproducible order -> reproducible views -> batches."""
