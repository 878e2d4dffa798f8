"""The pipeline's mechanism, in rooms: what each holds stands in docs/architecture.md."""
