"""Arrays that were computed once for each row and view, on disk; it knows neither who computed them nor for whom."""
