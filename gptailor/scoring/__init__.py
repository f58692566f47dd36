"""Who scores a plan: this process, or Dask workers (`cluster/`); what is known already is not scored again."""
