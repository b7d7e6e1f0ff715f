"""Questions on generated tables and the SQL queries that answer them; see README.md."""
