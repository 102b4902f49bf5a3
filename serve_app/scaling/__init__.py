"""How many replicas each stage needs: what is measured (``signals``), and what follows from it (``policy``, pure)."""
