{{/*
The agent in a training pod of your own chart. Make gradwatch a dependency, with `bridge.enabled: false` where the bridge
is another release's, and write in the pod's template:

    metadata:
      labels:
        {{- include "gradwatch.sidecar.labels" . | nindent 8 }}
    spec:
      terminationGracePeriodSeconds: {{ include "gradwatch.sidecar.gracePeriod" (dict "trainer" 30) }}
      securityContext:
        {{- include "gradwatch.sidecar.podSecurityContext" . | nindent 8 }}
      initContainers:
        {{- include "gradwatch.sidecar.container" . | nindent 8 }}
      containers:
        - name: trainer
          env:
            {{- include "gradwatch.sidecar.trainerEnv" . | nindent 12 }}
          volumeMounts:
            {{- include "gradwatch.sidecar.trainerMounts" . | nindent 12 }}
      volumes:
        {{- include "gradwatch.sidecar.volumes" (dict "root" . "ranks" 8) | nindent 8 }}

Settings are this chart's `sidecar` values: below `gradwatch:` in the values of yours.
*/}}

{{/* Our values and version, from a chart that depends on ours or from ours itself. */}}
{{- define "gradwatch.sidecar.settings" -}}
{{- $root := default . .root -}}
{{- $version := $root.Chart.AppVersion -}}
{{- $values := $root.Values -}}
{{- if hasKey $root.Values "gradwatch" -}}
{{- $values = $root.Values.gradwatch -}}
{{- $version = $root.Subcharts.gradwatch.Chart.AppVersion -}}
{{- end -}}
{{- $ranks := default $values.sidecar.ranks .ranks -}}
{{- merge (dict "ranks" $ranks "version" $version) $values.sidecar | toYaml -}}
{{- end -}}

{{/* The label by which the PodMonitor finds the pod. */}}
{{- define "gradwatch.sidecar.labels" -}}
gradwatch/sidecar: "true"
{{- end -}}

{{/* The trainer's grace period, and a minute for the agent after it. */}}
{{- define "gradwatch.sidecar.gracePeriod" -}}
{{- add (default 30 .trainer) 60 -}}
{{- end -}}

{{/* The shared group; the trainer may be root or not. */}}
{{- define "gradwatch.sidecar.podSecurityContext" -}}
{{- $settings := include "gradwatch.sidecar.settings" . | fromYaml -}}
fsGroup: {{ $settings.fsGroup | int }}
fsGroupChangePolicy: OnRootMismatch
{{- end -}}

{{/*
One item of initContainers. It stands until the kubelet, after the trainer's end, sends it SIGTERM; then it reads the
journal to its end, tells MLflow, and waits for a last scrape. No probe: one that fails would hold the training back.
*/}}
{{- define "gradwatch.sidecar.container" -}}
{{- $settings := include "gradwatch.sidecar.settings" . | fromYaml -}}
- name: gradwatch-agent
  image: {{ include "gradwatch.image" (dict "image" $settings.image "version" $settings.version) | quote }}
  imagePullPolicy: {{ $settings.image.pullPolicy }}
  restartPolicy: Always
  args:
    - --dir=/journal
    - --state=/var/lib/gradwatch
    - --listen=$(POD_IP):{{ $settings.port | int }}
    - --drain
    - --linger={{ $settings.lingerSeconds | int }}
    - --grace={{ add ($settings.lingerSeconds | int) 10 }}
  ports:
    - name: gw-metrics
      containerPort: {{ $settings.port | int }}
      protocol: TCP
  env:
    - name: POD_IP
      valueFrom: {fieldRef: {fieldPath: status.podIP}}
    - name: TMPDIR
      value: /var/lib/gradwatch
    {{- with $settings.mlflow.trackingUri }}
    - name: MLFLOW_TRACKING_URI
      value: {{ . | quote }}
    {{- end }}
  {{- with $settings.mlflow.existingSecret }}
  envFrom:
    - secretRef: {name: {{ . | quote }}}
  {{- end }}
  resources:
    {{- toYaml $settings.resources | nindent 4 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: {{ $settings.runAsUser | int }}
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL]}
    seccompProfile: {type: RuntimeDefault}
  volumeMounts:
    - name: gradwatch-journal
      mountPath: /journal
      readOnly: true
    - name: gradwatch-state
      mountPath: /var/lib/gradwatch
{{- end -}}

{{/* Items of the trainer's env: where to write, and who the run is. What a pod has no label for is empty there. */}}
{{- define "gradwatch.sidecar.trainerEnv" -}}
{{- $settings := include "gradwatch.sidecar.settings" . | fromYaml -}}
- name: GRADWATCH_DIR
  value: /journal
- name: GRADWATCH_JOURNAL_MB
  value: {{ $settings.ringMiB | int | quote }}
- name: JOB_UID
  valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/controller-uid']"}}
- name: JOBSET_UID
  valueFrom: {fieldRef: {fieldPath: "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"}}
- name: JOBSET_RESTART_ATTEMPT
  valueFrom: {fieldRef: {fieldPath: "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"}}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
{{- end -}}

{{/* Items of the trainer's volumeMounts. */}}
{{- define "gradwatch.sidecar.trainerMounts" -}}
- name: gradwatch-journal
  mountPath: /journal
{{- end -}}

{{/* Items of volumes. Memory, since a disk's writeback can stall the stores of a training. */}}
{{- define "gradwatch.sidecar.volumes" -}}
{{- $settings := include "gradwatch.sidecar.settings" . | fromYaml -}}
- name: gradwatch-journal
  emptyDir:
    medium: Memory
    sizeLimit: {{ add (mul ($settings.ranks | int) ($settings.ringMiB | int)) 16 }}Mi
- name: gradwatch-state
  emptyDir:
    sizeLimit: {{ $settings.stateMiB | int }}Mi
{{- end -}}
