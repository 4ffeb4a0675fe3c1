# Made by tests/plain/manual.rs from the table in src/pools/options.rs.
complete -c patroni-pools -f
complete -c patroni-pools -s f -l file -r -F -d 'read this file, or the .cfg files of this folder, as haproxy -f does; may be given several times (default: what haproxy.service names)'
complete -c patroni-pools -l agent -d 'check: also say what the pools without the agent lack for it'
complete -c patroni-pools -l list -d 'check: print a line for each server that asks Patroni, FILE:LINE POOL/SERVER CHECK, and nothing else'
complete -c patroni-pools -l rules -d 'check: explain the rules, and read no file'
complete -c patroni-pools -l socket -r -F -d 'status, save-states: HAProxy\'s stats socket (default: the one of the configuration, or else /run/haproxy/admin.sock)'
complete -c patroni-pools -l wait -x -d 'status, save-states: keep looking for at most this long, until all is well (status; default 0) or until no client waits for a server in a switchover (save-states; default 5)'
complete -c patroni-pools -l quiet -d 'status: print one line, for monitoring'
complete -c patroni-pools -l metrics -r -F -d 'status: print nothing, and write to this file what HAProxy\'s exporter does not tell Prometheus, for node_exporter\'s textfile collector'
complete -c patroni-pools -s h -l help -d 'print this help and exit'
complete -c patroni-pools -s V -l version -d 'print the version and exit'
complete -c patroni-pools -a 'check status save-states'
