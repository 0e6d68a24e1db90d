"""MLflow: tracked runs, registered models, their versions and aliases."""
