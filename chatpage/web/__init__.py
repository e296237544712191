"""The web application: page, API, panel routes."""
