"""Tasks, the app, and what is known of a job."""
