"""What a run is made from, opened once and handed on: model source, processor, data sets, the fullest micro-batch."""
