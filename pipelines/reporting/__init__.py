"""Tables, figures and the report page, made from metrics and samples."""
