"""What the tests and the benchmark of the dashboards share."""
