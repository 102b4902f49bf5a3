"""The autoscaling controller on Kubernetes: reads signals, decides with ``serve_app.scaling``, asks Serve to scale."""
