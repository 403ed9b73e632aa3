"""What a model would take and do elsewhere: shapes, footprint, speed."""
