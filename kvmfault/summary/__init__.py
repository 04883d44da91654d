"""What matters in a recording: figures that are gathered stretch by stretch, and put together in any grouping."""
