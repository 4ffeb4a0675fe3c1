# Made by tests/plain/manual.rs from the table in src/options.rs.
_patroni_agent_check() {
    local cur=${COMP_WORDS[COMP_CWORD]}
    case ${COMP_WORDS[COMP_CWORD - 1]} in
        --url) : ;;
        --patroni-user) : ;;
        --timeout) : ;;
        --else) mapfile -t COMPREPLY < <(compgen -W 'maint drain down' -- "$cur") ;;
        --unreachable) mapfile -t COMPREPLY < <(compgen -W 'down keep' -- "$cur") ;;
        --stopping) mapfile -t COMPREPLY < <(compgen -W 'drain maint' -- "$cur") ;;
        --hold-file) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
        --before-stop-file) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
        --grace) : ;;
        --memory-file) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
        --idle) : ;;
        --user) : ;;
        --cacert) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
        --cert) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
        --key) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
        --connect-to) : ;;
        --settings) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
        --reopen) : ;;
        *) mapfile -t COMPREPLY < <(compgen -W '--url --patroni-user --timeout --else --unreachable --stopping --agent-send --hold-file --before-stop-file --grace --memory-file --idle --user --syslog --cacert --cert --key -k --insecure --connect-to --settings --explain --reopen -h --help -V --version primary read-write master leader standby-leader standby_leader replica read-only sync synchronous async asynchronous quorum read-only-sync read-only-quorum health read-only-synchronous' -- "$cur") ;;
    esac
}
complete -F _patroni_agent_check patroni-agent-check
