"""What is compared: the pools, and what the faults and the figures must agree on."""

POOLS = {"postgres-write": 5000, "official": 5100, "role-only": 5200, "without-agent": 5300}
OURS, OFFICIAL, ROLE_ONLY, WITHOUT_AGENT = POOLS
# clients without HAProxy
MULTI_HOST = "multi-host"
ROUTES = (*POOLS, MULTI_HOST)
# those of the agent in the second HAProxy, where only the random walk has clients
SECOND, SECOND_READ = "second", "second-read"
SECOND_PORTS = {SECOND: 5010}, {SECOND_READ: 5011}
# the pools for reads that belong to them
READS = {OURS: "postgres-read", OFFICIAL: "replicas"}
READ_PORTS = {"postgres-read": 5001, "replicas": 5101}
# hard-stop-after of all of them, in seconds
HARD_STOP = 15
# how long an agent is silent after its node was promoted, in seconds
SILENCE = 10
