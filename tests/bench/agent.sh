#!/bin/bash
# An agent as a shell script, for comparison.
role=$(curl -s --max-time 1.5 "http://127.0.0.1:$1/primary" | jq -r 'select(.state == "running").role')
case $role in
    primary | master) echo "up ready # $role, running" ;;
    *) echo "up maint # not the primary" ;;
esac
