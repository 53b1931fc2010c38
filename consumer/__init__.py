"""The stream: events to rolling windows to looks to alerts, and the Kafka service around them."""
