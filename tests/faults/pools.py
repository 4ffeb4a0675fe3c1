"""The pools that are compared, and the settings that the faults and the figures share."""

POOLS = {"postgres-write": 5000, "official": 5100, "role-only": 5200, "without-agent": 5300}
OURS, OFFICIAL, ROLE_ONLY, WITHOUT_AGENT = POOLS
# clients without HAProxy
MULTI_HOST = "multi-host"
ROUTES = (*POOLS, MULTI_HOST)
# what the agent's pools are compared with
OTHERS = (OFFICIAL, ROLE_ONLY, WITHOUT_AGENT, MULTI_HOST, "replicas")
# the agent's pools in the second HAProxy, where only the random faults have clients
SECOND, SECOND_READ = "second", "second-read"
SECOND_PORTS = {SECOND: 5010}, {SECOND_READ: 5011}
# the pools for reads that belong to the pools for writes
READS = {OURS: "postgres-read", OFFICIAL: "replicas"}
READ_PORTS = {"postgres-read": 5001, "replicas": 5101}
# hard-stop-after of each HAProxy, in seconds
HARD_STOP = 15
# how long an agent stays silent after its node is promoted, in seconds
SILENCE = 10
