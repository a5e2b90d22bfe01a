"""What a trainer rank computes, without the distributed machinery: batches, log-probs, metrics, schedule, weights."""
