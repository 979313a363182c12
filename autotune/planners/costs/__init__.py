"""What a piece of work costs on a machine: as measured, between measurements, or by a datasheet."""
