"""Turn COCO JSON into checked Parquet shards, and these into batches of reproducible order and augmentation."""
