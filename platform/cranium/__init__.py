"""Cranium: Ray-distributed experiments on self-supervised brain MRI.

Declared cohorts (`datasets/*.yaml`) are ingested into Parquet shards of slice stacks; a plan streams them into DINOv2
pretraining; the backbone embeds labelled cohorts; cells of a declared grid are adapted and judged; MLflow keeps every
run and `report` writes one page. The stages are the modules at this level, in the order data flows: `cohort`,
`ingest`, `stream`, `pretrain`, `embed`, `adapt`, `sweep`, `report`; `flow` runs them all.
"""

__version__ = "0.1.0"
