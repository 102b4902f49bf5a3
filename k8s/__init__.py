"""The autoscaling controller on Kubernetes: reads signals, decides with ``serve_app.scaling``, asks Serve to scale.

``python -m k8s --config FILE`` (``k8s.config`` has the file's keys). docs/scaling.md tells how it works.

What it needs of Kubernetes, all in one namespace, and no more:

===================== ========== ================== =================================
API group             resource   verbs              may be narrowed to resourceNames
===================== ========== ================== =================================
ray.io                rayservices get               the RayService
coordination.k8s.io   leases     get, update        the Lease
coordination.k8s.io   leases     create             cannot be: a name is not known yet
events.k8s.io         events     create             cannot be
===================== ========== ================== =================================

It writes nothing that Helm or KubeRay own: replica counts go to Serve, and KubeRay's in-tree autoscaler follows Serve.
What it talks to: the API server, Prometheus, and port 8265 of the active cluster's head. What it listens on:
``metrics_port`` (9100), ``/metrics`` and ``/healthz``.
"""
