"""The Grafana dashboards, written by ``python -m loadtest.dashboards`` into the chart's folder."""
